"""What finished models are worth."""
