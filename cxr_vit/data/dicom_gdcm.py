"""A program of its own that decodes one compressed picture with GDCM, from stdin to stdout.

The arguments are the transfer syntax, the photometric interpretation, rows, columns, channels, bits
allocated, bits stored, and 1 if the values are signed. Nothing but the standard library and GDCM is
imported: the program starts for every picture, in 0.1 s.
"""

import resource
import sys

#: Limits beside what the pixels take: decoders hold several copies, of 4 bytes for each value.
_MEMORY, _PIXEL_MEMORY = 2**29, 64
_SECONDS, _PIXELS_PER_SECOND = 5, 500_000


def main(syntax: str, kind: str, *numbers: str) -> None:
    """Write the decoded values, little-endian; GDCM chooses 1, 2 or 4 bytes for each."""
    rows, columns, channels, allocated, stored, is_signed = map(int, numbers)
    values = rows * columns * channels
    memory = _MEMORY + _PIXEL_MEMORY * values
    seconds = _SECONDS + values // _PIXELS_PER_SECOND
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))

    import gdcm

    fragment = gdcm.Fragment()
    fragment.SetByteStringValue(sys.stdin.buffer.read())
    fragments = gdcm.SequenceOfFragments.New()
    fragments.AddFragment(fragment)
    element = gdcm.DataElement(gdcm.Tag(0x7FE0, 0x0010))
    element.SetValue(fragments.__ref__())
    image = gdcm.Image()
    image.SetNumberOfDimensions(2)
    image.SetDimensions((columns, rows, 1))
    image.SetDataElement(element)
    photometric = gdcm.PhotometricInterpretation
    image.SetPhotometricInterpretation(photometric(photometric.GetPIType(kind)))
    image.SetTransferSyntax(gdcm.TransferSyntax(gdcm.TransferSyntax.GetTSType(syntax)))
    image.SetPixelFormat(gdcm.PixelFormat(channels, allocated, stored, stored - 1, is_signed))
    # GDCM returns bytes as text.
    decoded = image.GetBuffer().encode("utf-8", "surrogateescape")
    if image.GetPlanarConfiguration() != 0:
        raise ValueError("the channels are not together")
    sys.stdout.buffer.write(decoded)


if __name__ == "__main__":
    main(*sys.argv[1:])
