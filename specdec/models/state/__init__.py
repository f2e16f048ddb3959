"""What a model keeps of a sequence and how it is rolled back."""
