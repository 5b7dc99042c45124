"""A transformer's state dict in the layout in which Tencent publishes it."""

from __future__ import annotations

import re

import torch

State = dict[str, torch.Tensor]

#: Back to the original's names, a substitution at a time.
BACK = (
    (r"^x_embedder\.", "img_in."),
    (r"^time_embed\.timestep_embedder\.", "time_in."),
    (r"^time_embed\.timestep_embedder_r\.", "time_r_in."),
    (r"^context_embedder\.time_text_embed\.timestep_embedder\.", "txt_in.t_embedder."),
    (r"^context_embedder\.time_text_embed\.text_embedder\.", "txt_in.c_embedder."),
    (r"^(time_in|time_r_in|txt_in\.t_embedder)\.linear_1\.", r"\1.mlp.0."),
    (r"^(time_in|time_r_in|txt_in\.t_embedder)\.linear_2\.", r"\1.mlp.2."),
    (r"^context_embedder\.proj_in\.", "txt_in.input_embedder."),
    (r"^context_embedder\.token_refiner\.refiner_blocks\.", "txt_in.individual_token_refiner.blocks."),
    (r"(refiner\.blocks\.\d+)\.attn\.to_out\.0\.", r"\1.self_attn_proj."),
    (r"(refiner\.blocks\.\d+)\.ff\.net\.0\.proj\.", r"\1.mlp.fc1."),
    (r"(refiner\.blocks\.\d+)\.ff\.net\.2\.", r"\1.mlp.fc2."),
    (r"(refiner\.blocks\.\d+)\.norm_out\.linear\.", r"\1.adaLN_modulation.1."),
    (r"^context_embedder_2\.norm\.", "byt5_in.layernorm."),
    (r"^context_embedder_2\.linear_", "byt5_in.fc"),
    (r"^image_embedder\.norm_in\.", "vision_in.proj.0."),
    (r"^image_embedder\.linear_1\.", "vision_in.proj.1."),
    (r"^image_embedder\.linear_2\.", "vision_in.proj.3."),
    (r"^image_embedder\.norm_out\.", "vision_in.proj.4."),
    (r"^cond_type_embed\.", "cond_type_embedding."),
    (r"^norm_out\.linear\.", "final_layer.adaLN_modulation.1."),
    (r"^proj_out\.", "final_layer.linear."),
    (r"^transformer_blocks\.", "double_blocks."),
    (r"(double_blocks\.\d+)\.norm1\.", r"\1.img_mod."),
    (r"(double_blocks\.\d+)\.norm1_context\.", r"\1.txt_mod."),
    (r"(double_blocks\.\d+)\.attn\.norm_added_([qk])\.", r"\1.txt_attn_\2_norm."),
    (r"(double_blocks\.\d+)\.attn\.norm_([qk])\.", r"\1.img_attn_\2_norm."),
    (r"(double_blocks\.\d+)\.attn\.add_([qkv])_proj\.", r"\1.txt_attn_\2."),
    (r"(double_blocks\.\d+)\.attn\.to_([qkv])\.", r"\1.img_attn_\2."),
    (r"(double_blocks\.\d+)\.attn\.to_out\.0\.", r"\1.img_attn_proj."),
    (r"(double_blocks\.\d+)\.attn\.to_add_out\.", r"\1.txt_attn_proj."),
    (r"(double_blocks\.\d+)\.ff\.", r"\1.img_mlp."),
    (r"(double_blocks\.\d+)\.ff_context\.", r"\1.txt_mlp."),
    (r"_mlp\.net\.0\.proj\.", "_mlp.fc1."),
    (r"_mlp\.net\.2\.", "_mlp.fc2."),
)


def original(state: State) -> State:
    """The state as Tencent would publish it."""
    renamed: State = {}
    for name, tensor in state.items():
        for pattern, replacement in BACK:
            name = re.sub(pattern, replacement, name)
        renamed[name] = tensor
    for kind in ("weight", "bias"):
        scale, shift = renamed[f"final_layer.adaLN_modulation.1.{kind}"].chunk(2)
        renamed[f"final_layer.adaLN_modulation.1.{kind}"] = torch.cat([shift, scale])
        for name in [name for name in renamed if name.endswith(f".attn.to_q.{kind}")]:
            parts = [renamed.pop(name.replace("to_q", f"to_{part}")) for part in "qkv"]
            renamed[name.replace("attn.to_q", "self_attn_qkv")] = torch.cat(parts)
    return renamed
