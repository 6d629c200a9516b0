// The box parser of @name@ for DeepStream's Gst-nvinfer, written by deploy.handover. It reads the candidates that the
// network gives and suppresses those that overlap, as deploy/runtime/postprocess.py does; nvinfer is told to cluster
// nothing (cluster-mode=4). The score of each class that counts is nvinfer's pre-cluster-threshold.

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <iostream>
#include <string>
#include <vector>

#include "nvdsinfer_custom_impl.h"

namespace {

constexpr double kIouThreshold = @nms_iou_threshold@;
constexpr std::size_t kMostDetections = @max_detections@;
constexpr bool kInRows = @in_rows@;  // one output (K, 6): x1 y1 x2 y2 score label; else boxes, scores and labels
const char *const kOutputs[] = {@output_names@};

struct Candidate {
  float x1, y1, x2, y2, score;
  unsigned int label;
};

bool Refuse(const std::string &reason) {
  std::cerr << "NvDsInferParse@function@: " << reason << std::endl;
  return false;
}

const NvDsInferLayerInfo *LayerOf(const std::vector<NvDsInferLayerInfo> &layers, const char *name) {
  for (const NvDsInferLayerInfo &layer : layers)
    if (std::strcmp(layer.layerName, name) == 0) return &layer;
  return nullptr;
}

// 4 is INT64, which newer versions of nvdsinfer.h have.
bool IsOfLabels(const NvDsInferLayerInfo &layer) {
  return layer.dataType == INT32 || static_cast<int>(layer.dataType) == 4;
}

// A value that is no label of a class becomes -1.
std::int64_t LabelAt(const NvDsInferLayerInfo &layer, std::size_t index) {
  if (layer.dataType == INT32) return static_cast<const std::int32_t *>(layer.buffer)[index];
  if (layer.dataType != FLOAT) return static_cast<const std::int64_t *>(layer.buffer)[index];
  const float value = static_cast<const float *>(layer.buffer)[index];
  return value >= 0.0f && value < 65536.0f ? static_cast<std::int64_t>(value) : -1;
}

double Overlap(const Candidate &one, const Candidate &other) {
  const double width = std::min<double>(one.x2, other.x2) - std::max<double>(one.x1, other.x1);
  const double height = std::min<double>(one.y2, other.y2) - std::max<double>(one.y1, other.y1);
  if (width <= 0.0 || height <= 0.0) return 0.0;
  const auto area = [](const Candidate &box) {
    return (static_cast<double>(box.x2) - box.x1) * (static_cast<double>(box.y2) - box.y1);
  };
  return width * height / (area(one) + area(other) - width * height);
}

// The candidates above their threshold, clipped to the network input; those without an area are left out.
bool ReadCandidates(const std::vector<NvDsInferLayerInfo> &layers, const NvDsInferNetworkInfo &network,
                    const std::vector<float> &thresholds, std::vector<Candidate> &candidates) {
  std::vector<const NvDsInferLayerInfo *> outputs;
  for (const char *name : kOutputs) {
    const NvDsInferLayerInfo *layer = LayerOf(layers, name);
    if (layer == nullptr) return Refuse(std::string("the network has no output ") + name);
    if (layer->dataType != FLOAT && (outputs.size() != 2 || !IsOfLabels(*layer)))
      return Refuse(std::string("the output ") + name + " is of another type than it was exported with");
    outputs.push_back(layer);
  }
  const std::size_t columns = kInRows ? 6 : 4;
  const std::size_t count = outputs[0]->inferDims.numElements / columns;
  const float *boxes = static_cast<const float *>(outputs[0]->buffer);
  const float *scores = kInRows ? boxes + 4 : static_cast<const float *>(outputs[1]->buffer);
  const NvDsInferLayerInfo &labels = *outputs.back();
  if (thresholds.empty()) return Refuse("there are no classes: see num-detected-classes");
  const float least = *std::min_element(thresholds.begin(), thresholds.end());
  for (std::size_t index = 0; index < count; ++index) {
    const float *box = boxes + columns * index;
    const float score = scores[kInRows ? columns * index : index];
    if (std::isnan(score)) return Refuse("a score is no number: a lower precision may have overflowed");
    const std::int64_t label = LabelAt(labels, kInRows ? columns * index + 5 : index);
    if (!(score > least)) continue;  // rows of padding, too, whose label may be any
    if (label < 0 || label >= static_cast<std::int64_t>(thresholds.size()))
      return Refuse("a label is that of no class: see num-detected-classes");
    if (!(score > thresholds[static_cast<std::size_t>(label)])) continue;
    if (!(std::isfinite(box[0]) && std::isfinite(box[1]) && std::isfinite(box[2]) && std::isfinite(box[3])))
      return Refuse("a box is no number: a lower precision may have overflowed");
    const auto inside = [](float value, unsigned int limit) {
      return std::min(std::max(value, 0.0f), static_cast<float>(limit));
    };
    const Candidate candidate = {inside(box[0], network.width), inside(box[1], network.height),
                                 inside(box[2], network.width), inside(box[3], network.height),
                                 score, static_cast<unsigned int>(label)};
    if (candidate.x2 > candidate.x1 && candidate.y2 > candidate.y1) candidates.push_back(candidate);
  }
  return true;
}

}  // namespace

extern "C" bool NvDsInferParse@function@(std::vector<NvDsInferLayerInfo> const &outputLayersInfo,
                                         NvDsInferNetworkInfo const &networkInfo,
                                         NvDsInferParseDetectionParams const &detectionParams,
                                         std::vector<NvDsInferObjectDetectionInfo> &objectList) {
  std::vector<Candidate> candidates, kept;
  if (!ReadCandidates(outputLayersInfo, networkInfo, detectionParams.perClassPreclusterThreshold, candidates))
    return false;
  std::stable_sort(candidates.begin(), candidates.end(),
                   [](const Candidate &one, const Candidate &other) { return one.score > other.score; });
  for (const Candidate &candidate : candidates) {
    if (kept.size() == kMostDetections) break;
    const bool is_new = std::none_of(kept.begin(), kept.end(), [&](const Candidate &better) {
      return better.label == candidate.label && Overlap(better, candidate) > kIouThreshold;
    });
    if (is_new) kept.push_back(candidate);
  }
  for (const Candidate &candidate : kept) {
    NvDsInferObjectDetectionInfo object{};
    object.classId = candidate.label;
    object.left = candidate.x1;
    object.top = candidate.y1;
    object.width = candidate.x2 - candidate.x1;
    object.height = candidate.y2 - candidate.y1;
    object.detectionConfidence = candidate.score;
    objectList.push_back(object);
  }
  return true;
}

CHECK_CUSTOM_PARSE_FUNC_PROTOTYPE(NvDsInferParse@function@);
