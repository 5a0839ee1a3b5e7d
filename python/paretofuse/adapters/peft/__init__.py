"""PEFT adapters as experts: LoRA directories and live PEFT models, by what PEFT itself would compute."""
