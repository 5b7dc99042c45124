"""Whether the demo model shows what was asked for, judged by its pixels alone."""
