"""Pictures from the same plan and runtime that training uses."""
