"""A page in the browser to try results by hand. Gradio is imported in this room only."""
