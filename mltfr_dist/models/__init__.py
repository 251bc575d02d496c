"""Plain `nn.Module`s: backbones and the MLTFR module. Nothing here knows of ranks."""
