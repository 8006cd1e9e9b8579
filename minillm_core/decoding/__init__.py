"""Text generation and scoring, the half that needs no framework."""
