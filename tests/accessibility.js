// What a reader with a keyboard, a screen reader, weak eyes or a narrow screen would stumble over, as sentences.
() => {
  const wrong = [], say = (what, element) => wrong.push(`${what}: ${(element?.outerHTML ?? "").slice(0, 120)}`);
  const all = (selector, root = document) => [...root.querySelectorAll(selector)];
  const shown = element => element.checkVisibility({ visibilityProperty: true }) && element.getClientRects().length > 0;

  if (!document.documentElement.lang) say("no language");
  if (!document.title) say("no title");
  if (all("main").length !== 1) say("not one main");
  const ids = all("[id]").map(element => element.id);
  if (new Set(ids).size < ids.length) say(`ids twice: ${ids.filter((id, place) => ids.indexOf(id) < place)}`);
  for (const element of all("[aria-labelledby]"))
    for (const id of element.getAttribute("aria-labelledby").split(/\s+/))
      if (!document.getElementById(id)?.textContent.trim()) say(`label ${id} says nothing`, element);

  let level = 0;
  for (const heading of all("h1, h2, h3, h4, h5, h6").filter(shown)) {
    const next = Number(heading.tagName[1]);
    if (next > level + 1) say("a level of headings left out", heading);
    level = next;
  }
  if (all("h1").length !== 1) say("not one h1");

  for (const picture of all("svg"))
    if (picture.getAttribute("aria-hidden") !== "true" &&
        (picture.getAttribute("role") !== "img" || !picture.querySelector(":scope > title")?.textContent.trim()))
      say("a picture without a name", picture);
  for (const picture of all("img:not([alt])")) say("an image without alt", picture);
  for (const table of all("table")) {
    if (!table.caption) say("a table without a caption", table);
    for (const heading of all("th:not([scope])", table)) say("a heading of nothing", heading);
  }
  const named = element => (element.getAttribute("aria-label") ?? element.labels?.[0]?.textContent ?? element.textContent).trim();
  for (const element of all("a[href], button, summary, input, select, textarea, [role=button]").filter(shown))
    if (!named(element)) say("a control without a name", element);
  for (const element of all("*").filter(shown))
    if (/auto|scroll/.test(getComputedStyle(element).overflowX) && element.scrollWidth > element.clientWidth + 1
        && element.tabIndex < 0 && !element.querySelector("a[href], button")) say("scrolls, but not by keyboard", element);
  if (document.documentElement.scrollWidth > innerWidth) {
    const wide = all("body *").filter(element => element.getBoundingClientRect().right > innerWidth + 1 && !element.closest(".scroll"));
    say(`wider than the window, ${document.documentElement.scrollWidth} > ${innerWidth}`, wide[0]);
  }

  // Contrast, as WCAG 2 has it: 4.5, of large letters 3. Colours are read by painting them.
  const paint = Object.assign(document.createElement("canvas"), { width: 1, height: 1 }).getContext("2d", { willReadFrequently: true });
  const seen = new Map();
  const colour = text => {
    if (!seen.has(text)) {
      paint.clearRect(0, 0, 1, 1); paint.fillStyle = text; paint.fillRect(0, 0, 1, 1);
      const [r, g, b, a] = paint.getImageData(0, 0, 1, 1).data;
      seen.set(text, [r, g, b, a / 255]);
    }
    return seen.get(text);
  };
  const over = (top, below, share = 1) => below.slice(0, 3).map((value, place) => value + (top[place] - value) * top[3] * share);
  const light = rgb => rgb.map(value => value / 255).map(value => value <= .04045 ? value / 12.92 : ((value + .055) / 1.055) ** 2.4)
    .reduce((sum, value, place) => sum + value * [.2126, .7152, .0722][place], 0);
  const contrast = (one, other) => { const [low, high] = [light(one), light(other)].sort((a, b) => a - b); return (high + .05) / (low + .05); };
  const behind = element => {
    const layers = [];
    for (let each = element; each; each = each.parentElement) layers.push(colour(getComputedStyle(each).backgroundColor));
    return layers.reverse().reduce((below, layer) => over(layer, below), colour("canvas"));
  };
  const below = text => {  // what is drawn under a text of a picture
    const box = text.getBoundingClientRect(), x = box.x + box.width / 2, y = box.y + box.height / 2;
    return all("rect", text.ownerSVGElement)
      .filter(rect => rect.compareDocumentPosition(text) & Node.DOCUMENT_POSITION_FOLLOWING)
      .filter(rect => { const b = rect.getBoundingClientRect(); return b.left <= x && x <= b.right && b.top <= y && y <= b.bottom; })
      .reduce((ground, rect) => {
        const style = getComputedStyle(rect);
        return style.fill === "none" ? ground : over(colour(style.fill), ground, style.fillOpacity * style.opacity);
      }, behind(text.ownerSVGElement));
  };
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const element = walker.currentNode.parentElement;
    if (!walker.currentNode.textContent.trim() || !shown(element) || element.closest("title, desc, script, style, .hidden, .skip")) continue;
    const style = getComputedStyle(element), drawn = element.closest("svg text");
    const ground = drawn ? below(drawn) : behind(element);
    const ink = over(colour(drawn ? style.fill : style.color), ground);
    const size = parseFloat(style.fontSize), needed = size >= 24 || (size >= 18.66 && style.fontWeight >= 700) ? 3 : 4.5;
    const found = contrast(ink, ground);
    if (found < needed) say(`contrast ${found.toFixed(2)} < ${needed}`, element);
  }
  return wrong;
}
