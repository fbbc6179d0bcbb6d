"""A local page that follows runs from their folders. It only reads."""
