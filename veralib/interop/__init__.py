"""Other people's formats: PEFT's VeRA folders both ways, export to LoRA, the Hugging Face hub."""
