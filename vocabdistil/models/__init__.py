"""Teachers, students and their vocabularies."""
