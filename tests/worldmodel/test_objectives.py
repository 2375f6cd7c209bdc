"""The objectives: what they ask, and of which rays and cells."""

import dataclasses

import numpy as np
import torch

from tests.worldmodel.conftest import tiny
from worldmodel.encoders.contract import Clouds
from worldmodel.model import OCCUPANCY_SLICES, WorldModel
from worldmodel.objectives import moving, occupancy, ray_forecast
from worldmodel.source import Source, clips_of_parts


def batch_of(parts):
    config = tiny()
    clips, weights = clips_of_parts(parts, config)
    return WorldModel(config), Source(clips, weights, config).batch(0)


def test_cells_are_those_that_small_steps_along_the_rays_visit(parts):
    model, batch = batch_of(parts)
    assert batch.future is not None
    clouds = Clouds(torch.cat((batch.newest.points, batch.future.points)), batch.newest.sizes + batch.future.sizes)
    origins = torch.cat((batch.newest_origin, batch.future_origin))
    met, through = occupancy.seen(model, clouds, origins)
    encoder, cell = model.config.encoder, model.cell_m
    high = (encoder.high[2] - encoder.low[2]) / OCCUPANCY_SLICES
    for index, points in enumerate(clouds.points[:, :3].double().split(clouds.sizes)):
        size = torch.tensor([cell, cell, high], dtype=torch.float64)
        shape = torch.tensor([met.shape[3], met.shape[2], met.shape[1]])

        def cells(places, size=size, shape=shape):
            found = torch.floor((places - torch.tensor(encoder.low)) / size).long()
            return found[((found >= 0) & (found < shape)).all(1)]

        ends = cells(points)
        truth = torch.zeros_like(met[index])
        truth[ends[:, 2], ends[:, 1], ends[:, 0]] = True
        assert (truth != met[index]).float().mean() < 1e-4  # a point on an edge, in single precision
        few = points[:: max(1, len(points) // 300)]
        origin = origins[index].double()
        shares = torch.linspace(0, 1, 4000, dtype=torch.float64)[:, None, None]
        walked = cells((origin + shares * (few - origin)).reshape(-1, 3))
        assert (met[index] | through[index])[walked[:, 2], walked[:, 1], walked[:, 0]].float().mean() > 0.999
    assert not (met & through).any()
    assert met.any(3).any(2).any(1).all() and through.any()


def test_a_state_that_tells_the_cells_has_no_loss_and_no_gradient_comes_from_unseen_ones(parts):
    model, batch = batch_of(parts)
    asked = [occupancy.seen(model, *where) for where in ((batch.newest, batch.newest_origin), (batch.future, batch.future_origin))]
    met, through = (torch.cat(both) for both in zip(*asked, strict=True))

    class Told(torch.nn.Module):
        def forward(self, states):
            return logits

    model.occupancy = Told()
    logits = torch.where(met, 30.0, torch.where(through, -30.0, torch.randn(met.shape))).requires_grad_()
    output = model_output(model, batch)
    loss = occupancy.loss(model, batch, output)
    assert float(loss.detach()) < 1e-6
    logits = torch.zeros(met.shape, requires_grad=True)
    occupancy.loss(model, batch, output).backward()
    assert np.isclose(float(logits.grad[met].sum()), -0.25) and np.isclose(float(logits.grad[through].sum()), 0.25)
    assert not logits.grad[~met & ~through].any()


def model_output(model, batch):
    with torch.no_grad():
        return model(batch)


def test_clips_without_a_future_are_asked_about_the_present_and_no_cloud_asks_nothing(parts):
    model, batch = batch_of(parts)
    output = model_output(model, batch)
    none = dataclasses.replace(batch, future=None)
    assert 0 < float(occupancy.loss(model, none, output).detach()) != float(occupancy.loss(model, batch, output).detach())
    empty = dataclasses.replace(none, newest=Clouds(batch.newest.points[:0], (0,) * len(batch.newest.sizes)))
    assert float(occupancy.loss(model, empty, output).detach()) == 0.0


def test_moving_asks_for_the_cells_of_what_was_found_to_move_and_for_no_others(parts):
    model, batch = batch_of(parts)
    train, encoder = model.config.train, model.config.encoder
    assert len(batch.movers.sizes) == train.clips + train.dense_clips
    points = torch.zeros(4, len(encoder.features))
    points[:, :3] = torch.tensor([(encoder.low[0] + 0.1, encoder.low[1] + 0.1, 0.0), (0.1, 2.1 * model.cell_m, 0.0), (0.2, 2.2 * model.cell_m, 1.0),
                                  (encoder.high[0] + 0.1, 0.0, 0.0)])  # fmt: skip
    batch = dataclasses.replace(batch, movers=Clouds(points, (1, 3) + (0,) * (len(batch.movers.sizes) - 2)))
    output = model_output(model, batch)
    shape = output.latents[:, 0, 0].shape
    found = moving.cells(model, batch, shape)
    middle = shape[2] // 2
    assert found.nonzero().tolist() == [[0, 0, 0], [1, shape[1] // 2 + 2, middle]]

    class Told(torch.nn.Module):
        def forward(self, latents):
            return logits

    model.moving = Told()
    logits = torch.where(found, 30.0, -30.0)[:, None].requires_grad_()
    assert float(moving.loss(model, batch, output).detach()) < 1e-6
    logits = torch.zeros_like(logits, requires_grad=True)
    moving.loss(model, batch, output).backward()
    per_cell = 0.5 / found.numel()
    assert torch.allclose(logits.grad[:, 0], torch.where(found, -moving.POSITIVE_WEIGHT * per_cell, per_cell))


def test_what_the_state_adds_to_told_readings_has_a_price_and_elsewhere_none(parts):
    model, batch = batch_of(parts)
    output = model_output(model, batch)
    told = (batch.rays.told & batch.rays.with_evidence)[: batch.stateful]
    assert told.any() and not told.all()
    base = float(ray_forecast.loss(model, batch, output))
    for rows, price in ((told, ray_forecast.CHANGE_PRICE), (~told, 0.0)):
        change = torch.where(rows[:, None, None], torch.ones_like(output.change), torch.zeros_like(output.change))
        assert np.isclose(float(ray_forecast.loss(model, batch, dataclasses.replace(output, change=change))), base + price, atol=1e-4)


def test_what_is_hidden_is_not_asked_with_its_evidence_and_the_prior_is_asked_everything(parts):
    model, batch = batch_of(parts)
    output = model_output(model, batch)
    batch = dataclasses.replace(batch, hidden=torch.arange(len(batch.ranges)) % 3 == 0)
    free = dataclasses.replace(output, change=torch.zeros_like(output.change))
    asked = ((~batch.hidden).float() * batch.weight)[: batch.stateful]
    wanted = ray_forecast.range_loss(output.model, batch.ranges[: batch.stateful], asked, 0.1)
    alone = ray_forecast.range_loss(output.prior, batch.ranges, batch.weight, 0.1)
    rest = ray_forecast.appearance_loss(output.model, batch)
    assert np.isclose(float(ray_forecast.loss(model, batch, free)), float(wanted + alone + rest), atol=1e-5)
