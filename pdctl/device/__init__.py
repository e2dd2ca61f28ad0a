"""The device that holds a rank's pools: the port, and what must happen first for host memory, CUDA and Ascend."""
