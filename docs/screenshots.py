"""Makes the pictures of the report in docs/images from a run: `python -m docs.screenshots`.

The run is that of `compressor demo`, with a budget in trials instead of minutes, so that what else
the machine does decides less. It goes on where an earlier one in the same folder ended.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from compressor.report.html import write_report

FOLDER = Path(__file__).parent / "images"
SIZES = {  # name: width, height, colours
    "desktop": (1280, 1500, "light"),
    "phone": (390, 1500, "light"),
    "dark": (1280, 1500, "dark"),
}
SECTIONS = {"sensitivity": "#sensitivity", "layers": "#layers", "training": "#training"}
MOST_BYTES = 300_000  # of a picture


def main() -> None:
    """Run the demo unless its result is there, then take the pictures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run-dir", type=Path, default=Path("runs/demo"))
    parser.add_argument("--trials", type=int, default=8)
    arguments = parser.parse_args()
    folder = arguments.run_dir
    compress(folder, arguments.trials)
    page = write_report(json.loads((folder / "result.json").read_text()), folder / "report.html")
    take_pictures(page, FOLDER)


def compress(folder: Path, trials: int) -> None:
    """The demo's job in `folder`; read, where it is finished."""
    from compressor import Device, Engine, TorchForwardPass, TorchFramework
    from compressor.cli.demo import Accuracy, CrossEntropy, demo_config, trained_reference
    from compressor.cli.digits import digit_loaders

    data = digit_loaders()
    model = trained_reference(folder, data["train"], epochs=25, seed=0, device=Device.CPU)
    config: dict[str, Any] = demo_config(folder, seed=0, device=Device.CPU, is_quick=False)
    Engine(
        framework=TorchFramework(),
        data=data,
        model=model,
        config={**config, "budget": {"trials": trials}},
        forward_pass=TorchForwardPass(model_input_pattern=(0, "_")),
        eval_func=Accuracy(),
        loss_function_cls=CrossEntropy,
        loss_function_kwargs={},
    ).run()


def take_pictures(page: Path, folder: Path) -> None:
    """One picture of `page` for each of `SIZES` and `SECTIONS`: `report_<name>.png` in `folder`.

    Sizes show the top of the page; sections are taken whole, on a desktop in light colours.
    """
    from tests.report.browser import launched

    folder.mkdir(parents=True, exist_ok=True)
    with launched() as browser:
        for name, (width, height, scheme) in SIZES.items():
            context = browser.new_context(
                viewport={"width": width, "height": height}, color_scheme=scheme
            )
            tab = context.new_page()
            tab.goto(page.absolute().as_uri())
            tab.wait_for_selector("html[data-ready=true]")
            tab.screenshot(path=folder / f"report_{name}.png")
            if name == "desktop":
                tab.locator("button[data-chart=damage]").nth(1).click()  # more than one column
                for section, place in SECTIONS.items():
                    tab.locator(place).screenshot(path=folder / f"report_{section}.png")
            context.close()
    for name in (*SIZES, *SECTIONS):
        path = folder / f"report_{name}.png"
        assert path.stat().st_size < MOST_BYTES, f"{path} is too large for the docs."


if __name__ == "__main__":
    main()
