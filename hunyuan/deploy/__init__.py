"""Workers on RunPod: `hunyuan deploy`."""
