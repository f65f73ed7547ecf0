"""What a compiled program holds, read from its text: instructions, loops, and what its devices send each other."""
