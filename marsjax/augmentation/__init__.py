"""What low-active users borrow: strategies swapped as a set, and the controls they must beat."""
