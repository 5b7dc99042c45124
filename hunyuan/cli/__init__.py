"""The `hunyuan` command."""
