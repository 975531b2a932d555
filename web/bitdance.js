// What ComfyUI's page lacks for these nodes: the texts that they report stay on them, and older workflow files open.

import { app } from "../../scripts/app.js";

const NAME = "BitDance";
const TEXT = "bitdance_text"; // the widget
const PROGRESS_TEXT = "$$node-text-preview"; // the page's own, which newer pages remove when a job ends

function showText(node, lines) {
    const text = [lines ?? []].flat().join("\n");
    removeWidget(node, PROGRESS_TEXT); // it said the same while the node ran
    if (!text) return removeWidget(node, TEXT);
    const widget = node.widgets?.find((widget) => widget.name === TEXT) ?? addText(node);
    widget.element.textContent = text;
    const [width, height] = node.computeSize();
    node.setSize([Math.max(node.size[0], width), Math.max(node.size[1], height)]);
    node.setDirtyCanvas(true, true);
}

function addText(node) {
    const element = document.createElement("div");
    element.className = "bitdance-text";
    Object.assign(element.style, {
        overflow: "auto",
        padding: "4px 6px",
        whiteSpace: "pre-wrap",
        userSelect: "text",
        font: "12px/1.4 sans-serif",
        color: "var(--input-text)",
        background: "var(--comfy-input-bg)",
        borderRadius: "4px",
    });
    const widget = node.addDOMWidget(TEXT, "BITDANCE_TEXT", element, {
        serialize: false, // not in prompts
        hideOnZoom: false,
        getMinHeight: () => 64,
        getMaxHeight: () => 160,
    });
    widget.serialize = false; // nor in workflow files
    return widget;
}

function removeWidget(node, name) {
    const widget = node.widgets?.find((widget) => widget.name === name);
    if (widget) node.removeWidget(widget);
}

// our text encode had an id that another pack has too: theirs has no input `clip`
function renameOldNodes(nodes) {
    for (const node of nodes ?? [])
        if (node.type === "BitDanceTextEncode" && node.inputs?.some((input) => input.name === "clip")) {
            node.type = "BitDancePrompt";
            if (node.properties?.["Node name for S&R"]) node.properties["Node name for S&R"] = node.type;
        }
}

// the page sorts nodes whose names begin with the words by how often they are used, and then by length; it counts the
// uses of packs that it knows
const USED_MOST = ["BitDanceLoadModel", "BitDanceNextPatchSampler", "BitDancePrompt"];

function countUses(definitions) {
    for (const definition of definitions) {
        const place = USED_MOST.indexOf(definition.name);
        if (place < 0) continue;
        definition.postProcessSearchScores = ([kind, ...scores]) =>
            kind <= 1 ? [kind, place - USED_MOST.length, ...scores] : [kind, 0, ...scores];
    }
}

if (!app.extensions.some((extension) => extension.name === NAME))
    app.registerExtension({
        name: NAME,
        beforeConfigureGraph(graph) {
            for (const { nodes } of [graph, ...(graph.definitions?.subgraphs ?? [])]) renameOldNodes(nodes);
        },
        beforeRegisterVueAppNodeDefs: countUses,
        beforeRegisterNodeDef(nodeType, definition) {
            if (!definition.name.startsWith("BitDance")) return;
            const onExecuted = nodeType.prototype.onExecuted;
            nodeType.prototype.onExecuted = function (output) {
                onExecuted?.apply(this, arguments);
                showText(this, output?.text);
            };
        },
    });
