"""What the pages say, done: their commands and examples, the notebook, the wheel, the rendered pages."""
