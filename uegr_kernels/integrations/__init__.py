"""The methods inside other people's training loops; each module is imported on demand."""
