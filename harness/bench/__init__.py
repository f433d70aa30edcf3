"""Step time and memory of every variant, of peft and of bitsandbytes, over one floor."""
