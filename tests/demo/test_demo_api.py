"""What the page of the API shows to copy."""

from pathlib import Path

import pytest
from conftest import textured
from demo_server import running, tiny_export
from PIL import Image

pytest.importorskip("gradio")
from gradio_client import Client, handle_file


def test_api_snippets_name_local_files_and_files_have_to_be_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with running(tiny_export(tmp_path), monkeypatch) as page, monkeypatch.context() as inside:
        inside.chdir(tmp_path)
        Image.fromarray(textured(48, 40, 3)).save("photo.jpg")
        client = Client(page.local_url, download_files=str(tmp_path / "downloads"), verbose=False)
        info = client.view_api(print_info=False, return_format="dict")["named_endpoints"]
        assert len(info) == 9
        for name, endpoint in info.items():
            assert "http" not in str([each["example_input"] for each in endpoint["parameters"]]), name
            assert not [
                each["label"] for each in endpoint["returns"] if each["label"].startswith("value_")
            ], name
        # as the page of the API writes it: what must be given, with its example
        needed = {
            each["parameter_name"]: handle_file(each["example_input"]["url"])
            for each in info["/reconstruct"]["parameters"]
            if not each["parameter_has_default"]
        }
        assert list(needed) == ["photo"]
        assert client.predict(**needed, api_name="/reconstruct")[4]["width"] == 48
        with pytest.raises(TypeError, match="second"):  # and not the example's mirror image
            client.predict(first=handle_file("photo.jpg"), api_name="/interpolate")
