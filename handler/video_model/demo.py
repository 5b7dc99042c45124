"""The demo model: a trained HunyuanVideo15Pipeline of 25 MB that draws simple moving objects, on any CPU.

Every component has the class of the published checkpoint, in small. `demo_weights/README.md` is its model card, and
`tools/demo_model/` the code that trained it.
"""

from pathlib import Path
from typing import Final

import torch
from diffusers import HunyuanVideo15Pipeline
from tokenizers import Regex, normalizers
from transformers import Qwen2Tokenizer

from contract.job import MAX_PROMPT_LENGTH
from handler.video_model.catalog import Checkpoint, Sampling

#: Renders 288x160 for 16:9: of the sizes with at most 48 latents of 32 x 32 pixels, the nearest one.
CHECKPOINT: Final = Checkpoint("demo", 222, Sampling(num_inference_steps=12, shift=1.2, guidance_scale=3.0))

WEIGHTS: Final = Path(__file__).parent / "demo_weights"
#: The file of a checkpoint that makes previews, see `preview.py`; `tools/demo_model/assemble.py` measures it.
PROJECTION: Final = WEIGHTS / "preview.safetensors"
SYSTEM_MESSAGE: Final = "Describe the video"


def load_pipeline(directory: Path = WEIGHTS) -> HunyuanVideo15Pipeline:
    """Reads the pipeline in float32. Weights are stored in 16 bits and fewer."""
    pipeline = HunyuanVideo15Pipeline.from_pretrained(directory, dtype=torch.float32)
    read_words(pipeline.tokenizer)
    prefix = pipeline.tokenizer.apply_chat_template([{"role": "system", "content": SYSTEM_MESSAGE}], tokenize=True)
    pipeline.system_message = SYSTEM_MESSAGE
    pipeline.prompt_template_encode_start_idx = len(prefix["input_ids"])
    pipeline.tokenizer_max_length = 4 * MAX_PROMPT_LENGTH + 32  # an unknown character is up to four tokens
    return pipeline


def read_words(tokenizer: Qwen2Tokenizer) -> None:
    """Makes the tokenizer read small letters and digits alone: the model knows whole words, each after a space.

    `from_pretrained` builds Qwen's own normalizer.
    """
    tokenizer.backend_tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Lowercase(), normalizers.Replace(Regex(r"[^\p{L}\p{N}]+"), " ")]
    )
