"""The loaders held against torchvision, pixel by pixel."""
