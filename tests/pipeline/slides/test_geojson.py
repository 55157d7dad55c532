"""tiles.geojson is what RFC 7946 says a FeatureCollection is, and what QuPath makes objects of."""

import json
from dataclasses import replace
from typing import Any
from uuid import UUID

import numpy as np
import pytest

from pipeline.report import as_json
from pipeline.slides import geojson
from tests.pipeline.slides.answered import LESION_UM, a_result


def refuse_unless_rfc_7946(said: Any) -> None:
    """Sections 3, 3.1.6 and 3.2 of the RFC, for what we write: closed rings of four positions or more, the outer one
    counter-clockwise, no ring that crosses itself."""
    assert said["type"] == "FeatureCollection" and isinstance(said["features"], list)
    assert "crs" not in said  # section 4: removed
    for feature in said["features"]:
        assert feature["type"] == "Feature" and {"geometry", "properties"} <= set(feature)
        assert isinstance(feature["id"], str | int)
        assert not {"coordinates", "geometries", "features"} & set(feature)  # section 7.1
        geometry = feature["geometry"]
        assert geometry["type"] == "Polygon" and not {"geometry", "properties", "features"} & set(geometry)
        for number, ring in enumerate(geometry["coordinates"]):
            assert len(ring) >= 4 and ring[0] == ring[-1]
            assert all(len(place) == 2 and all(isinstance(one, int | float) for one in place) for place in ring)
            corners = np.array(ring)
            area = float(np.sum(corners[:-1, 0] * corners[1:, 1] - corners[1:, 0] * corners[:-1, 1]) / 2)
            assert area > 0 if number == 0 else area < 0


def test_it_is_geojson() -> None:
    said = json.loads(as_json(geojson.collection(a_result())))
    refuse_unless_rfc_7946(said)
    assert len(said["features"]) == 18


def test_tiles_lie_in_pixels_of_the_finest_level() -> None:
    """At 0.25 um a tile of 112 um has 448 pixels."""
    said = geojson.collection(a_result())
    ring = np.array(said["features"][0]["geometry"]["coordinates"][0])
    np.testing.assert_allclose(ring[2] - ring[0], (448, 448))
    middle = (ring[0] + ring[2]) / 2 * 0.25
    assert np.abs(middle - LESION_UM[:2]).max() <= 56


def test_pixels_that_are_not_square_are_counted_per_axis() -> None:
    clean = a_result()
    result = replace(clean, frame=replace(clean.frame, microns_per_pixel=(0.25, 0.5)))
    ring = np.array(geojson.collection(result)["features"][0]["geometry"]["coordinates"][0])
    np.testing.assert_allclose(ring[2] - ring[0], (448, 224))


def test_no_polygon_leaves_the_slide() -> None:
    clean = a_result()
    result = replace(clean, frame=replace(clean.frame, size_px=(13_000, 6_000)))
    rings = [feature["geometry"]["coordinates"][0] for feature in geojson.collection(result)["features"]]
    corners = np.array([ring for ring in rings if ring[0][0] < 13_000 and ring[0][1] < 6_000])
    assert corners[..., 0].max() <= 13_000 and corners[..., 1].max() <= 6_000


def test_objects_have_what_qupath_reads() -> None:
    result = a_result()
    said = geojson.collection(result)["features"]
    kinds = {feature["properties"]["classification"]["name"] for feature in said}
    assert kinds == {"for tumour", "against tumour"}
    for feature in said:
        assert str(UUID(feature["id"])) == feature["id"]  # QuPath takes an id for a UUID, or fails
        told = feature["properties"]
        assert told["objectType"] == "annotation"
        colour = told["classification"]["color"]
        assert len(colour) == 3 and all(isinstance(one, int) and 0 <= one <= 255 for one in colour)
        assert all(isinstance(value, int | float) for value in told["measurements"].values())
    best = said[0]["properties"]["measurements"]
    assert best["rank"] == 1 and best["share of tumour (logits)"] == pytest.approx(result.values.max())
    assert len({feature["id"] for feature in said}) == len(said)


def test_a_slide_without_tiles_worth_showing_is_an_empty_collection() -> None:
    said = geojson.collection(replace(a_result(), top=(), against=()))
    refuse_unless_rfc_7946(said)
    assert said["features"] == []
