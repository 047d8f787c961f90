import torch

torch.set_num_threads(1)  # tiny tensors gain nothing from more
