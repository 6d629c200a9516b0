// Calls the box parser PARSER as nvinfer does: parser_driver WIDTH HEIGHT CLASSES THRESHOLD (NAME TYPE FILE)...
// prints a line for each object; ends with 1 where the parser refuses.
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <iterator>
#include <string>
#include <vector>

#include "nvdsinfer_custom_impl.h"

extern "C" bool PARSER(std::vector<NvDsInferLayerInfo> const &, NvDsInferNetworkInfo const &,
                       NvDsInferParseDetectionParams const &, std::vector<NvDsInferObjectDetectionInfo> &);

int main(int count, char **words) {
  NvDsInferNetworkInfo network = {unsigned(std::atoi(words[1])), unsigned(std::atoi(words[2])), 3};
  NvDsInferParseDetectionParams params;
  params.numClassesConfigured = unsigned(std::atoi(words[3]));
  params.perClassPreclusterThreshold.assign(params.numClassesConfigured, std::strtof(words[4], nullptr));
  std::vector<std::vector<char>> buffers;
  std::vector<NvDsInferLayerInfo> layers;
  for (int i = 5; i + 2 < count; i += 3) {
    std::ifstream file(words[i + 2], std::ios::binary);
    buffers.emplace_back(std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>());
    NvDsInferLayerInfo layer{};
    layer.layerName = words[i];
    layer.dataType = static_cast<NvDsInferDataType>(std::atoi(words[i + 1]));
    layers.push_back(layer);
  }
  for (std::size_t i = 0; i < layers.size(); ++i) {
    layers[i].buffer = buffers[i].data();
    layers[i].inferDims.numElements = unsigned(buffers[i].size() / (int(layers[i].dataType) == 4 ? 8 : 4));
  }
  std::vector<NvDsInferObjectDetectionInfo> objects;
  if (!PARSER(layers, network, params, objects)) return 1;
  for (const NvDsInferObjectDetectionInfo &object : objects)
    std::printf("%u %.9g %.9g %.9g %.9g %.9g\n", object.classId, object.left, object.top, object.width, object.height,
                object.detectionConfidence);
}
