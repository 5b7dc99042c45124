"""How the demo model is made: its world, its training, and its evaluation."""
