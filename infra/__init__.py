"""What it takes to ship the service: see docs/."""
