"""What both sides of the queue agree on. Imports pydantic, tenacity and structlog, and no package of ours."""
