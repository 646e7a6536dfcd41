import torch

from genstream.training.initialisation import initialise_decoder, take_over_decoder
from genstream.vae.tiny import TinyVideoVAE


def decoder(widths: list[int], blocks: list[int], seed: int) -> TinyVideoVAE:
    torch.manual_seed(seed)
    vae = TinyVideoVAE(latent_channels=4, encoder_width=4, decoder_widths=widths, decoder_blocks=blocks)
    initialise_decoder(vae)
    for weight in vae.decoder.parameters():
        weight.data.add_(0.1 * torch.randn_like(weight))
    return vae.double()


def test_a_decoder_of_the_same_widths_is_taken_over_whole():
    teacher, student = (decoder([12, 12, 8, 8], [2, 1, 1], seed) for seed in (0, 1))
    take_over_decoder(student, teacher)
    latents = torch.randn(1, 4, 3, 2, 2, dtype=torch.float64)
    assert torch.equal(student.decode(latents), teacher.decode(latents))


def test_stages_of_the_same_width_are_taken_over_block_by_block():
    teacher = decoder([12, 12, 8, 8], [2, 2, 2], 0)
    student = decoder([12, 12, 6, 6], [1, 2, 1], 1)
    own = {name: weight.clone() for name, weight in student.decoder.state_dict().items()}
    take_over_decoder(student, teacher)
    given = teacher.decoder.state_dict()
    same = {name for name, weight in student.decoder.state_dict().items() if torch.equal(weight, own[name])}
    # The first convolution, one block, growth and convolution; then the second stage, up to where it narrows.
    taken = {1: 1, 3: 3, 5: 6, 6: 7, 7: 8, 8: 9, 10: 11}
    for name, weight in student.decoder.state_dict().items():
        layer, _, rest = name.partition(".")
        if int(layer) in taken:
            assert torch.equal(weight, given[f"{taken[int(layer)]}.{rest}"])
        else:
            assert name in same
