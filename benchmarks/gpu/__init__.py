"""What training costs on a CUDA device, on random models of 0.1 to 8 billion weights; on a CPU in its smallest form."""
