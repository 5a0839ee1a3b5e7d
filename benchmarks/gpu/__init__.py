"""What is known of the GPU path: by machine code without one, by measuring with one."""
