"""Where jobs wait: the server's own SQL queue, or RunPod's."""
