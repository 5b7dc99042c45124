"""Where jobs wait: our own SQL queue, or RunPod's."""
