"""Teachers, students, and what goes from one to the other."""
