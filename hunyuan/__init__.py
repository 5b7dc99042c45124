"""Use a HunyuanVideo service: a client, and the `hunyuan` command."""
