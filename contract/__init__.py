"""What both sides of the queue agree on. Imports pydantic and the standard library only."""
