"""The demo model's world, training and evaluation."""
