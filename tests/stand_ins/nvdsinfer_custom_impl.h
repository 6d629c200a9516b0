// What the box parser of deploy.handover needs of NVIDIA's nvdsinfer.h and nvdsinfer_custom_impl.h, written by hand from
// the fields that the API reference of the DeepStream SDK lists (docs.nvidia.com/metropolis/deepstream/dev-guide/sdk-api).
#pragma once

#include <vector>

#define NVDSINFER_MAX_DIMS 8

typedef enum { FLOAT = 0, HALF = 1, INT8 = 2, INT32 = 3, INT64 = 4 } NvDsInferDataType;

typedef struct {
  unsigned int numDims;
  unsigned int d[NVDSINFER_MAX_DIMS];
  unsigned int numElements;
} NvDsInferDims;

typedef struct {
  NvDsInferDataType dataType;
  union {
    NvDsInferDims inferDims;
  };
  int bindingIndex;
  const char *layerName;
  void *buffer;
  int isInput;
} NvDsInferLayerInfo;

typedef struct {
  unsigned int width;
  unsigned int height;
  unsigned int channels;
} NvDsInferNetworkInfo;

typedef struct {
  unsigned int classId;
  float left;
  float top;
  float width;
  float height;
  float detectionConfidence;
} NvDsInferObjectDetectionInfo;

typedef struct {
  unsigned int numClassesConfigured;
  std::vector<float> perClassPreclusterThreshold;
  std::vector<float> perClassPostclusterThreshold;
  std::vector<float> &perClassThreshold = perClassPreclusterThreshold;
} NvDsInferParseDetectionParams;

typedef bool (*NvDsInferParseCustomFunc)(std::vector<NvDsInferLayerInfo> const &, NvDsInferNetworkInfo const &,
                                         NvDsInferParseDetectionParams const &,
                                         std::vector<NvDsInferObjectDetectionInfo> &);

#define CHECK_CUSTOM_PARSE_FUNC_PROTOTYPE(customParseFunc)                                            \
  static void checkFunc_##customParseFunc(NvDsInferParseCustomFunc func = customParseFunc) {          \
    checkFunc_##customParseFunc();                                                                    \
  };                                                                                                  \
  extern "C" bool customParseFunc(std::vector<NvDsInferLayerInfo> const &, NvDsInferNetworkInfo const &, \
                                  NvDsInferParseDetectionParams const &, std::vector<NvDsInferObjectDetectionInfo> &);
