"""What several test files share: cases, workers, compilers."""
