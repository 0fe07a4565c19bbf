"""The parts of the page: one file each, and the sidebar that all of them have."""
