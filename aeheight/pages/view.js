"use strict";

const SIDES = ["left", "right"];
const byId = (id) => document.getElementById(id);

/** A number as a person reads it, with a true minus. */
function told(value, unit, digits = 1) {
  if (value === null || value === undefined) return "–";
  const text = value.toFixed(digits).replace(/^-(0(\.0*)?)$/, "$1").replace("-", "−");
  return unit ? `${text} ${unit}` : text;
}

/** What the address names after `#`: layers, year, place of the divider and of the map. */
function remembered() {
  return Object.fromEntries(new URLSearchParams(location.hash.slice(1)));
}

async function fetched(address) {
  const answer = await fetch(address);
  if (!answer.ok) throw new Error(answer.statusText);
  return answer.json();
}

function complain(what, error) {
  byId("trouble").textContent = `${what} cannot be read: ${error.message}. Is aeheight view still running?`;
  byId("trouble").hidden = false;
}

/** Text for where HTML is wanted. */
function escaped(text) {
  const element = document.createElement("span");
  element.textContent = text;
  return element.innerHTML;
}

/** A value of a layer, with its sign where it is a difference. */
function toldOf(layer, value) {
  const [low, high] = layer.limits;
  const text = told(value, layer.unit, high - low < 10 ? 2 : 1);
  return low === -high && value > 0 ? `+${text}` : text;
}

/** What stands under a colour bar; what lies beyond its ends has their colours. */
function ticks(layer) {
  const [low, high] = layer.limits;
  const digits = high - low < 10 ? 1 : 0;
  const short = (value, unit) => told(value, unit, digits).replace(/\.0(?= |$)/, "");
  const plus = low === -high ? "+" : "";
  return [
    `${low === 0 ? "" : "≤ "}${short(low, "")}`,
    short((low + high) / 2, ""),
    `≥ ${plus}${short(high, layer.unit)}`,
  ];
}

/** The card of a side: which layer, and what its colours mean. */
function legend(side, layers, choose) {
  const card = byId(side);
  card.append(byId("legend").content.cloneNode(true));
  card.querySelector(".side").textContent = side[0].toUpperCase() + side.slice(1);
  const select = card.querySelector("select");
  select.append(...layers.map((layer) => new Option(layer.title, layer.name)));
  select.addEventListener("change", () => choose(side, select.value));
  return function show(layer) {
    select.value = layer.name;
    const [low, high] = layer.limits;
    card.querySelector(".bar").style.background = `linear-gradient(90deg, ${layer.colours.join()})`;
    card.querySelectorAll(".ticks span").forEach((span, i) => { span.textContent = ticks(layer)[i]; });
    card.querySelector(".about").textContent = layer.about;
    card.title = layer.about;
  };
}

/** A mark on the bar of a side, where a value lies. */
function mark(side, layer, value) {
  const sign = byId(side).querySelector(".bar i");
  const known = value !== null && value !== undefined;
  sign.hidden = !known;
  if (!known) return;
  const [low, high] = layer.limits;
  sign.style.left = `${100 * Math.min(Math.max((value - low) / (high - low), 0), 1)}%`;
}

/** Runs the last of the calls asked for, one at a time; `what` they read, for when they fail. */
function oneAtATime(what, call) {
  let busy = false;
  let next = null;
  return async function ask(...given) {
    next = given;
    if (busy) return;
    busy = true;
    while (next) {
      const now = next;
      next = null;
      try {
        await call(...now);
        byId("trouble").hidden = true;
      } catch (error) {
        complain(what, error);
      }
    }
    busy = false;
  };
}

function makeMap(about, state) {
  const map = L.map("map", { zoomControl: false, fadeAnimation: false, zoomSnap: 0.25, zoomDelta: 0.5, maxZoom: about.zoom + 4 });
  L.control.zoom({ position: "bottomright" }).addTo(map);
  L.control.scale({ imperial: false, maxWidth: 140 }).addTo(map);
  map.attributionControl.setPrefix('<a href="https://leafletjs.com">Leaflet</a>');
  const [zoom, lat, lng] = (state.map || "").split("/").map(Number);
  if (Number.isFinite(lng)) {
    map.setView([lat, lng], zoom);
  } else {
    const narrow = map.getSize().x <= 640;
    map.fitBounds(about.bounds, narrow
      ? { paddingTopLeft: [6, 96], paddingBottomRight: [6, 150] }
      : { paddingTopLeft: [16, 16], paddingBottomRight: [16, 16] });
  }
  map.on("zoomend", () => {
    map.getContainer().classList.toggle("coarse", map.getZoom() > about.zoom);
  });
  return map;
}

function firstState(about) {
  const names = about.layers.map((layer) => layer.name);
  const state = { left: names[0], right: names[1] || names[0], year: about.years.at(-1), at: "0.5" };
  const wanted = remembered();
  for (const side of SIDES) if (names.includes(wanted[side])) state[side] = wanted[side];
  if (about.years.includes(Number(wanted.year))) state.year = Number(wanted.year);
  if (Number(wanted.at) >= 0 && Number(wanted.at) <= 1) state.at = wanted.at;
  if (wanted.map) state.map = wanted.map;
  return state;
}

function describe(about) {
  document.title = `${about.name}: height map`;
  byId("name").textContent = about.name;
  const surface = { dsm: "surface model (DSM)", dtm: "terrain model (DTM)" }[about.surface] || about.surface;
  const year = about.years.length > 1 ? [] : about.years;
  byId("about").textContent = [...year, surface, about.vertical_datum].join(" · ");
  byId("description").textContent = about.description;
}

function chooseYear(about, state, changed) {
  const select = byId("year");
  select.append(...about.years.map((year) => new Option(year, year)));
  select.value = state.year;
  select.addEventListener("change", () => {
    state.year = Number(select.value);
    changed();
  });
  byId("years").hidden = about.years.length < 2;
}

/** Values of all layers, where the mouse is, or where the map was last tapped. */
function readValues(map, about, state) {
  const list = document.querySelector("#values dl");
  const circles = [["#fff", 5], ["#1b262f", 2]].map(([color, weight]) => (
    L.circleMarker([0, 0], { radius: 7, color, weight, fill: false, interactive: false })
  ));
  const ring = L.layerGroup(circles);
  const mouse = matchMedia("(hover: hover)").matches;
  let pinned = false;
  let last = null;

  const read = oneAtATime("The values", async (place) => {
    const { lat, lng } = place.wrap();
    const { values } = await fetched(`values/${state.year}?lon=${lng}&lat=${lat}`);
    last = place;
    byId("place").textContent = `${told(lat, "", 5)}°, ${told(lng, "", 5)}°${pinned && mouse ? " (click to let go)" : ""}`;
    list.replaceChildren(...about.layers.flatMap((layer) => {
      const [term, value] = [document.createElement("dt"), document.createElement("dd")];
      term.textContent = layer.title;
      value.textContent = toldOf(layer, values[layer.name]);
      return [term, value];
    }));
    for (const side of SIDES) mark(side, about.layers.find((l) => l.name === state[side]), values[state[side]]);
  });

  map.on("mousemove", (event) => { if (!pinned) read(event.latlng); });
  map.on("click", (event) => {
    pinned = !(pinned && mouse);
    for (const circle of circles) circle.setLatLng(event.latlng);
    if (pinned) ring.addTo(map);
    else ring.remove();
    read(event.latlng);
  });
  return () => { if (last) read(last); };
}

function start(about) {
  const state = firstState(about);
  const find = (name) => about.layers.find((layer) => layer.name === name);
  describe(about);
  const map = makeMap(about, state);
  const panes = Object.fromEntries(SIDES.map((side) => [side, map.createPane(side)]));
  const address = (side) => `tiles/${state[side]}/${state.year}/{z}/{x}/{y}.png`;
  const options = { bounds: about.bounds, maxNativeZoom: about.zoom, maxZoom: about.zoom + 4, attribution: about.attribution.map(escaped).join(" · ") };
  const tiles = Object.fromEntries(SIDES.map((side) => [
    side, L.tileLayer(address(side), { ...options, pane: side }).addTo(map),
  ]));
  for (const side of SIDES) tiles[side].on("tileerror", () => renewed(about));

  const remember = () => {
    const { lat, lng } = map.getCenter();
    state.map = `${map.getZoom()}/${lat.toFixed(5)}/${lng.toFixed(5)}`;
    history.replaceState(null, "", `#${new URLSearchParams(state)}`);
  };
  const reread = readValues(map, about, state);
  const shows = Object.fromEntries(SIDES.map((side) => [side, legend(side, about.layers, choose)]));
  function choose(side, name) {
    state[side] = name;
    draw();
  }
  function draw() {
    for (const side of SIDES) {
      if (tiles[side]._url !== address(side)) tiles[side].setUrl(address(side));
      shows[side](find(state[side]));
    }
    remember();
    reread();
  }
  chooseYear(about, state, draw);
  const move = swipe(map, panes.left, panes.right, byId("divider"), (at) => {
    state.at = at.toFixed(3);
    remember();
  });
  move(Number(state.at));
  draw();
  map.on("moveend", remember);
  window.addEventListener("focus", () => renewed(about));
}

/** An export that was made anew has other colours: begin again with it. */
const renewed = oneAtATime("The map", async (about) => {
  const now = await fetched("layers.json");
  if (now.stamp !== about.stamp) location.reload();
});

fetched("layers.json").then(start).catch((error) => complain("The map", error));
