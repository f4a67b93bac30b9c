"""vera demo: the main job in about three minutes."""


def demo() -> None:
    """Fine-tune a real pretrained model on real text in about three minutes; no download.

    Example:

        vera demo
    """
    from ..demo import main

    main()
