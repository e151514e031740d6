"""What the fused block costs, beside plain PyTorch, torch.compile and the memory limit."""
