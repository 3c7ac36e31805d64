"use strict";

/** A divider over a map: what lies left of it is seen in one pane, what lies right in another.
 *
 * @param {L.Map} map
 * @param {HTMLElement} left Pane of the map whose layers are seen left of the divider.
 * @param {HTMLElement} right Pane whose layers are seen right of it.
 * @param {HTMLElement} divider Lies over the map, and is dragged or moved with the arrow keys.
 * @param {(at: number) => void} moved Is told where it lies, once it rests.
 * @returns {(at: number) => void} Moves it: 0 is the map's left edge, 1 its right edge.
 */
function swipe(map, left, right, divider, moved) {
  const STEPS = { ArrowLeft: -0.02, ArrowRight: 0.02, PageDown: -0.1, PageUp: 0.1, Home: -1, End: 1 };
  let at = 0.5;

  function clip() {
    const { x: width, y: height } = map.getSize();
    const corner = map.containerPointToLayerPoint([0, 0]);
    const middle = corner.x + Math.round(at * width);
    const [top, bottom] = [corner.y, corner.y + height];
    left.style.clip = `rect(${top}px, ${middle}px, ${bottom}px, ${corner.x}px)`;
    right.style.clip = `rect(${top}px, ${corner.x + width}px, ${bottom}px, ${middle}px)`;
    divider.style.left = `${Math.round(at * width)}px`;
    divider.setAttribute("aria-valuenow", Math.round(100 * at));
  }

  function move(to) {
    at = Math.min(Math.max(to, 0), 1);
    clip();
  }

  divider.addEventListener("pointerdown", (event) => {
    divider.setPointerCapture(event.pointerId);
    event.preventDefault();
    divider.focus();
  });
  divider.addEventListener("pointermove", (event) => {
    if (!divider.hasPointerCapture(event.pointerId)) return;
    const box = map.getContainer().getBoundingClientRect();
    move((event.clientX - box.left) / box.width);
  });
  divider.addEventListener("lostpointercapture", () => moved(at));
  divider.addEventListener("keydown", (event) => {
    if (!(event.key in STEPS)) return;
    event.preventDefault();
    move(at + STEPS[event.key]);
    moved(at);
  });
  map.on("move zoomend resize", clip);
  return move;
}
