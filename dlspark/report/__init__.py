"""Pictures, and pages that hold all of what they show."""
