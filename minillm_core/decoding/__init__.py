"""Text generation and scoring: the part that needs no framework."""
