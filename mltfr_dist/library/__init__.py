"""What `import mltfr_dist` offers: the commands as functions. See docs/library.md."""
