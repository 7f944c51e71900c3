"""The studio's views, one a file: each draws itself into the frame."""
